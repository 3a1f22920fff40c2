"""Model families and what they need."""
