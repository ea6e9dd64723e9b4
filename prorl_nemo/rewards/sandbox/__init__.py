"""Running other people's programs: what they may do, and who watches them."""
