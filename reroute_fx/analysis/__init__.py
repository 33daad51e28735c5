"""What routing costs and saves, by theory, and what a compilation did."""
