"""Load tests and comparisons; each is one command that writes data and a report.

python -m bench.demo       one server unshaped, then shaped, on the same traffic
python -m bench.load       latency of a server that already runs
python -m bench.summarise  the numbers that synthetic traffic is drawn from
"""
