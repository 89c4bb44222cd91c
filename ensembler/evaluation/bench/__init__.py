"""Methods side by side: the ensemble, the ported patch, the members alone."""
