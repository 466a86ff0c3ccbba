"""Tables: what a preset of conf/table shows, from run records and published numbers to text."""
