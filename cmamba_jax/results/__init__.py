"""What was measured: `records` of runs and benchmarks, and the tables that RESULTS.md (`sweeps`) and README.md show."""
