//! The receiving side of a channel: which shards have arrived, which are asked for again, what is reported.
