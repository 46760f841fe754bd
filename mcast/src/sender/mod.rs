//! The sending side of a channel: what is multicast next, and how fast.
