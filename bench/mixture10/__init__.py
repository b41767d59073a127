"""All methods on ten sub-datasets, at several budgets and at equal compute."""
