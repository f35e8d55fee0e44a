"""What every training run shares: settings, its folder, its records and its pictures."""
