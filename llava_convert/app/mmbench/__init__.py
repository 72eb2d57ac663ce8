"""MMBench and CCBench: the questions of a TSV file put to a model, its answers scored as xtuner scores them."""
