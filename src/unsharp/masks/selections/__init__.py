"""The selections, one file each."""
