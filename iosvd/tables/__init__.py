"""Tables: from run records and published numbers to text, as a preset of conf/table says."""
