"""Methods compared at equal compute, on mixtures whose sub-datasets peak at different epochs."""
