"""The rewards room: groups in, scored groups out; a reward is a plain function named in the run file."""
