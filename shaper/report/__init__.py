"""What people see: tables, plots, and one self-contained HTML file."""
