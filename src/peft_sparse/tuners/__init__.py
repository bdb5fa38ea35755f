"""PEFT's contract: one folder per method with the four files that every PEFT tuner has, over what the two share."""
