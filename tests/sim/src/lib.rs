//! SnowFlock under a virtual clock: N clones, their pagers, a network and a page server in one thread, from one seed.
//!
//! The pagers are memtap's own, the server's sessions memserver's; their shells, the fault port, the guests and the network are models that misbehave as the real
//! ones may, only more often:
//!
//! - [`network`]: loses, duplicates, reorders, delays and parts; streams are cut and reset;
//! - [`port`]: a userfaultfd whose events come late and out of order, which is busy while a discard is unread, and which takes
//!   discarded pages away some time after it said so;
//! - [`guest`]: threads that read, write and discard, and know what each page must hold;
//! - [`server`]: memserver's sessions and schedule behind streams; [`datagrams`]: a model of a page server behind datagrams;
//! - [`world`]: all of them together, with the properties that are checked.
//!
//! The multicast channel has a world of its own, with lighter clones and many more of them: [`multicast`].
//!
//! Apart from it are the bodies of fuzz targets: [`operations`] drives one pager through any list of operations against a
//! simple model, [`client`] a session of memserver through anything that a client may send, [`codecs`] the decoders
//! of messages and frame sets, [`files`] those of files, [`working_sets`] what is learnt from clones, [`linux_memory`] the introspection of a guest's memory, [`xen_ring`]
//! the ring of a Xen port.
//!
//! Everything random comes from the seed, so a run repeats exactly. What is checked: a page that a guest reads is the image's,
//! or what the guest wrote, or zeros after a discard; bytes from the server are installed at most once for each page; every
//! thread comes to its end, unless the pager says that it failed and the scenario gives it a reason to; the pager keeps to
//! the server's limits; where nothing goes wrong, no fault takes long.

pub mod client;
pub mod codecs;
pub mod datagrams;
pub mod events;
pub mod files;
pub mod guest;
pub mod image;
pub mod linux_memory;
pub mod multicast;
pub mod network;
pub mod operations;
pub mod port;
pub mod scenario;
pub mod server;
pub mod shell;
pub mod working_sets;
pub mod world;
pub mod xen_ring;

pub use scenario::Scenario;
pub use world::{Report, World};

/// Runs the scenario that `seed` stands for; prints the seed when a property does not hold.
///
/// # Panics
/// When a property does not hold.
pub fn run(seed: u64) -> Report {
    let _named = Named { what: "simulation", variable: "SIM_SEED", test: "simulation", seed };
    World::new(Scenario::draw(seed)).run()
}

/// Runs a clone of the scenario that `seed` stands for, without mishaps, and then a sibling that does the same and is told what
/// the first needed; with a head start of so long. Tells the demand faults of both.
///
/// # Panics
/// When a property does not hold.
pub fn siblings(seed: u64, head_start: std::time::Duration) -> [u64; 2] {
    let _named = Named { what: "siblings", variable: "SIM_SEED", test: "simulation", seed };
    let mut scenario = Scenario::draw(seed).without_mishaps();
    (scenario.clones, scenario.working_set, scenario.head_start) = (1, true, head_start);
    // Several would take turns in another order when they wait for other pages, and draw other numbers.
    scenario.threads = 1;
    let first = World::new(scenario.clone()).run();
    let needed = first.needed.clone().expect("working sets are kept");
    let second = World::new(scenario).knowing(needed).run();
    [first, second].map(|report| report.pagers.iter().map(|pager| pager.demand_faults).sum())
}

/// Prints the seed of a run that panics.
struct Named {
    what: &'static str,
    /// The environment variable by which the test is told to run this seed alone.
    variable: &'static str,
    test: &'static str,
    seed: u64,
}

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { what, variable, test, seed } = self;
            eprintln!(
                "{what} failed; run it again with {variable}={seed} cargo test --release -p snowflock-tests --test {test}"
            );
        }
    }
}
