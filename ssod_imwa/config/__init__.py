"""Options, the tree of keys made of them, and its reader; `runs.config` has every key."""
