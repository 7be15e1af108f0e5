"""What every other file may use: reading untrusted files, writing results, and facts about the device."""
