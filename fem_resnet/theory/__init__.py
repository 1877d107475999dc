"""The statements of sections 2 and 3 as tools and checks: limits, spectra, energy, sensitivity."""
