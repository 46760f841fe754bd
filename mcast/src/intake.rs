//! The receiver and the bytes of incomplete blocks, together: datagrams in, pages out.
