"""The accounting: by phase of a step, what is sent, held and computed."""
