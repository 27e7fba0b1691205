"""The parts of `python -m bench.rack`.

outcome    what is kept of a run
store      runs that are done, in files
pool       runs in processes; searches that ask for runs
policies   the racks that are compared
searches   the best static knobs, the highest clock
plan       which runs make which rows
rows       the arithmetic of a row, tables, aims
variants   what the result depends on
page       the report
"""
