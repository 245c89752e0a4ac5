"""From measured times to a profile: the fit of the cost model's efficiencies, and the engines it drives."""
