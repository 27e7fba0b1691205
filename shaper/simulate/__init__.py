"""Virtual time: engines, alone or as a rack, without servers and without sleeping."""
