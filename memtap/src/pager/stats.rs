use serde::Serialize;

/// What a pager has done so far. Counts are of pages (4096 bytes) unless they say otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PagerStats {
    /// Faults reported by the port.
    pub faults: u64,
    /// Of these, faults by writes.
    pub write_faults: u64,
    /// Faults on a page that someone else was waiting for already.
    pub coalesced: u64,
    /// Faults on a page that was there already.
    pub late: u64,
    /// Faults answered with zeros at once: zero, free, or discarded frames, or such as are about to be overwritten.
    pub avoided: u64,
    /// Faults on a page that was on its way already.
    pub covered: u64,
    /// Faults on a page that was not there and had to be fetched, whether it was on its way already or not; that several wait for
    /// one page counts once.
    pub demand_faults: u64,
    /// Pages of zeros installed without asking for them.
    pub zeros_installed: u64,
    /// Pages installed because someone waited for them, or because the clone needs them before it runs.
    pub demand_pages: u64,
    /// Pages installed that were asked for ahead of a stream of faults, or because the descriptor says so.
    pub prefetch_pages: u64,
    /// Pages installed that were asked for because siblings needed them.
    pub order_pages: u64,
    /// Pages installed that were asked for in the background.
    pub hydrate_pages: u64,
    /// Pages installed that came without having been asked for, as over multicast.
    pub unasked_pages: u64,
    /// Pages found in place by the port, put there by someone else.
    pub found_pages: u64,
    /// Pages that arrived although they were there already.
    pub duplicates: u64,
    /// Pages that arrived after the guest had given them up or someone had said that they will be overwritten, or that need no
    /// bytes.
    pub stale: u64,
    /// Pages given up by the guest.
    pub discarded: u64,
    /// Missing pages that need no fetch any more because someone said that they will be overwritten.
    pub overwritten: u64,
    /// Requests for demand pages.
    pub demand_requests: u64,
    /// Requests for bulk pages.
    pub bulk_requests: u64,
    /// Pages on their way as bulk that were asked for again because someone waits for them.
    pub promoted: u64,
    /// Requests that got no answer in time.
    pub timeouts: u64,
    /// Requests that the source answered with an error.
    pub refusals: u64,
    /// Pages asked for again, for whatever reason.
    pub retried: u64,
    /// Pages that nobody waits for and that could not be had; they are asked for again when someone does.
    pub given_up: u64,
    /// How often the source went away.
    pub source_losses: u64,
}
