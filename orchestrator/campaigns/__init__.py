"""Campaigns: matrices of measurements, expanded to jobs and run over days by controllers that may die."""
