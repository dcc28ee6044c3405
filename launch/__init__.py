"""Start any command on one machine or many. Imports nothing of the other rooms."""
