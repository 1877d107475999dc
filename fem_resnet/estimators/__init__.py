"""Estimators in scikit-learn's protocol, over the learning problem; they need scikit-learn."""
