"""Recipe of the bundled demo model: a tiny text-to-video Wan model trained from scratch on rendered shapes."""
