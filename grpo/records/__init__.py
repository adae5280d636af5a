"""What a run shows and leaves behind: its folder, its metrics, its progress on a terminal."""
