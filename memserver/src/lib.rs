//! The page server: serves the memory image of a forked VM to the pagers of its clones.
