"""What sections 2.1 and 3 say, as tools and checks: limits, spectra, energy, sensitivity."""
