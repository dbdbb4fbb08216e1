"""Generated protocol messages (`make proto`); not a public API."""
