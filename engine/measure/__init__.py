"""What bench.py measures: one module for each of its subjects. Nothing else imports these."""
