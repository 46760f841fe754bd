/// What a sender has done and seen. Counters never go down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SenderStats {
    /// Datagrams with shards sent for the first time, demand then bulk.
    pub data: [u64; 2],
    /// Datagrams with shards sent again, demand then bulk.
    pub repaired: [u64; 2],
    /// Datagrams with parity, demand then bulk.
    pub parity: [u64; 2],
    /// HEARTBEAT, END and CONFIRM datagrams.
    pub control: u64,
    /// Bytes of all these datagrams.
    pub bytes: u64,
    /// Blocks, demand then bulk.
    pub blocks: [u64; 2],
    /// Frames asked for that were not sent again, since they are about to be, or just were.
    pub suppressed: u64,
    /// Frames asked for.
    pub demanded: u64,
    /// Requests for frames that were not taken: of strangers, beyond the image, or too many.
    pub demand_refused: u64,
    /// NACK datagrams.
    pub nacks: u64,
    /// Blocks named in them.
    pub nacked: u64,
    /// Of those, the ones that a repair on its way already answers.
    pub nacked_late: u64,
    /// Of those, the ones that went beyond what their member may ask for.
    pub nacked_beyond: u64,
    /// Answers in CONFIRM datagrams.
    pub confirmed: u64,
    /// Of those, the ones that refuse.
    pub refused: u64,
    /// REPORT datagrams.
    pub reports: u64,
    /// Datagrams that are no NACK or REPORT of this version.
    pub malformed: u64,
    /// NACKs and REPORTs of other sessions.
    pub other_session: u64,
    /// NACKs and REPORTs of nobody in the channel.
    pub strangers: u64,
    /// REPORTs that came after a later one.
    pub stale: u64,
    /// NACK entries and REPORTs that cannot be true.
    pub nonsense: u64,
    /// Passes of bulk over what members lacked.
    pub passes: u64,
    /// Members moved to unicast.
    pub expelled: u64,
}
