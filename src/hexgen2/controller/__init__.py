"""Watches a plan that is served, and changes it with the least disturbance when the load or the fleet does."""
