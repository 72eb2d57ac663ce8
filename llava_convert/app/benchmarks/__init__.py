"""`eval TASKS`: lmms-eval's benchmarks, answered by a model of any layout."""
