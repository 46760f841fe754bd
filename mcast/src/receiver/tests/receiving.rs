use fastrand::Rng;
use proptest::prelude::*;

use super::*;
use crate::receiver::Receiver;

#[test]
fn a_clean_bulk_block_comes_out_whole() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    let id = server.block(Class::Bulk, map(&[(5, 10, true), (100, 300, false), (1000, 57, true)]));
    let data = server.data(id);
    clone.hear(data[..data.len() - 1].to_vec());
    assert!(clone.runs.is_empty());
    clone.hear(data[data.len() - 1..].to_vec());
    let runs: Vec<_> = clone.runs.iter().map(|run| (run.start().index(), run.count().get())).collect();
    assert_eq!(runs, [(100, 300), (5, 10), (1000, 57)]);
    assert_eq!(clone.events, [ChannelEvent::Live]);
    clone.hear([server.heartbeat()]);
    assert!(clone.asked(ms(100)).is_empty());
    let stats = clone.intake.stats();
    assert_eq!((stats.blocks, stats.lost, stats.useless, stats.dropped.total()), (1, 0, 0, 0));
}

#[test]
fn demand_pages_come_out_one_by_one() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    let id = server.block(Class::Demand, map(&[(50, 2, true), (60, 3, false), (70, 1, true)]));
    let data = server.data(id);
    let mut known = Vec::new();
    for datagram in data {
        clone.hear([datagram]);
        known.push(clone.frames.len());
    }
    assert_eq!(known, [3, 3, 4, 4, 4, 5, 5, 5, 6]);
}

#[test]
fn pages_come_out_without_the_map() {
    let mut server = Server::new(8948, Start::default());
    let mut clone = Clone::of(&server);
    let id = server.block(Class::Demand, map(&[(50, 9, true), (80, 7, true)]));
    let data = server.data(id);
    // Shards begin in pages 0, 2, 4, 6, 8, 10, 12, 15 of which the fifth is of the first run and the sixth of the second.
    clone.hear(data[1..].to_vec());
    let there: Vec<u64> = clone.frames.keys().copied().collect();
    assert_eq!(there, [53, 54, 55, 56, 57, 58, 81, 82, 83, 84, 85, 86]);
    clone.hear(data[..1].to_vec());
    assert_eq!(clone.frames.len(), 16);
    assert!(clone.frames.values().all(|times| *times == 1));
}

#[test]
fn slow_bulk_comes_out_in_pieces() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    let id = server.block(Class::Bulk, map(&[(0, 20, true)]));
    let data = server.data(id);
    clone.hear(data[..20].to_vec());
    assert!(clone.frames.is_empty());
    clone.now += ms(3);
    clone.hear([server.heartbeat()]);
    assert_eq!(clone.frames.len(), 7, "a pulse shows how late it is");
    clone.hear(data[20..40].to_vec());
    assert_eq!(clone.frames.len(), 14);
}

#[test]
fn what_was_sent_before_is_not_missed() {
    let mut server =
        Server::new(1448, Start { seq: Serial::new(u32::MAX - 3), next_block: [Serial::new(u32::MAX); 2] });
    let early = server.block(Class::Bulk, map(&[(0, 20, true)]));
    let mut before = server.data(early);
    let after = before.split_off(before.len() - 20);
    let mut clone = Clone::new(ReceiverConfig {
        start: Start { seq: server.seq.minus(20), ..config(&server).start },
        ..config(&server)
    });
    clone.hear(before);
    assert_eq!(clone.intake.stats().dropped.early, clone.intake.stats().dropped.total());
    assert!(clone.events.is_empty(), "a datagram from before the join is no sign of life");
    clone.hear(after);
    let id = server.block(Class::Bulk, map(&[(100, 20, true)]));
    let data = server.data(id);
    clone.hear(data);
    clone.hear([server.heartbeat()]);
    assert!(clone.asked(ms(500)).is_empty());
    assert_eq!(clone.frames.len(), 20);
    let stats = clone.intake.stats();
    assert_eq!((stats.lost, stats.useless), (0, 20));
}

#[test]
fn another_session_is_dropped_and_silence_follows() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    clone.hear([server.heartbeat()]);
    server.channel.session = 78;
    let id = server.block(Class::Demand, map(&[(0, 1, true)]));
    for _ in 0..10 {
        clone.wait(ms(100));
        let data = server.data(id);
        clone.hear(data);
        clone.hear([server.heartbeat()]);
    }
    assert_eq!(clone.events, [ChannelEvent::Live, ChannelEvent::Silent]);
    assert!(clone.frames.is_empty());
    assert_eq!(clone.intake.stats().dropped.session, 40);
    server.channel.session = 77;
    clone.hear([server.heartbeat()]);
    assert_eq!(clone.events.last(), Some(&ChannelEvent::Live));
}

#[test]
fn a_block_far_ahead_needs_a_pulse() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    server.next = [Serial::new(100_000), Serial::new(3_000_000_000)];
    let (a, b) = (server.block(Class::Demand, map(&[(0, 1, true)])), server.block(Class::Bulk, map(&[(8, 1, true)])));
    for id in [a, b] {
        let data = server.data(id);
        clone.hear(data);
    }
    // Half of all numbers lie behind.
    assert_eq!((clone.intake.stats().dropped.ahead, clone.intake.stats().useless), (3, 3));
    server.next[1] = Serial::new(100_000);
    clone.hear([server.heartbeat()]);
    for class in [Class::Demand, Class::Bulk] {
        let id = server.block(class, map(&[(20 + class_index(class) as u64, 1, true)]));
        let data = server.data(id);
        clone.hear(data);
    }
    assert_eq!(clone.frames.len(), 2);
    assert!(clone.intake.stats().missed > 190_000);
}

#[test]
fn contradictions_are_dropped() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    let id = server.block(Class::Bulk, map(&[(0, 20, true)]));
    let count = server.count(id);
    let mut data = server.data(id);
    clone.hear(data[1..2].to_vec());
    data[2][3] = count + 1;
    data[3].pop();
    clone.hear(data[2..4].to_vec());
    assert_eq!(clone.intake.stats().dropped.contradicting, 2);
    // A map with another number of pages.
    data[0][24..24 + 128].copy_from_slice(&map(&[(0, 40, true)]).encode());
    clone.hear(data[..1].to_vec());
    assert_eq!(clone.intake.stats().dropped.contradicting, 3);
    clone.hear(data[4..].to_vec());
    assert_eq!((clone.frames.len(), clone.intake.stats().given_up), (0, 1));
}

#[test]
fn incomplete_blocks_are_bounded_and_the_oldest_bulk_goes_first() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::new(ReceiverConfig { max_blocks: 4, ..config(&server) });
    let ids: Vec<_> = (0..6).map(|at| server.block(Class::Bulk, map(&[(at * 20, 20, true)]))).collect();
    let all: Vec<_> = ids.iter().map(|id| server.data(*id)).collect();
    all.iter().for_each(|data| clone.hear(data[1..].to_vec()));
    assert_eq!(clone.intake.stats().given_up, 2);
    all.iter().for_each(|data| clone.hear(data[..1].to_vec()));
    assert_eq!(clone.frames.keys().copied().collect::<Vec<_>>(), (40..120).collect::<Vec<_>>());
}

#[test]
fn what_nobody_takes_is_bounded() {
    let mut server = Server::new(8948, Start::default());
    let mut clone = Clone::of(&server);
    for at in 0..1000 {
        let id = server.block(Class::Demand, map(&[(at, 1, true)]));
        let data = server.data(id);
        data.iter().for_each(|datagram| clone.intake.handle(ms(0), datagram));
    }
    assert_eq!(clone.intake.stats().dropped.full, 1000 - Receiver::MAX_UNTAKEN as u64);
    clone.take();
    assert_eq!(clone.frames.len(), Receiver::MAX_UNTAKEN);
}

/// Blocks for a property: by class, runs of which some are zeros.
fn blocks() -> impl Strategy<Value = Vec<(bool, Vec<(u64, bool)>)>> {
    prop::collection::vec((any::<bool>(), prop::collection::vec((1..=8_u64, prop::bool::weighted(0.7)), 1..6)), 1..8)
}

/// Makes the blocks, each frame once.
fn make(server: &mut Server, blocks: &[(bool, Vec<(u64, bool)>)], limit: u64) -> (Vec<BlockId>, u64) {
    let mut at = 0;
    let mut total = 0;
    let mut ids = Vec::new();
    for (is_demand, runs) in blocks {
        let mut left = limit;
        let mut all = Vec::new();
        for (count, stored) in runs {
            let count = if *stored { (*count).min(left) } else { *count };
            if count == 0 {
                break;
            }
            left -= if *stored { count } else { 0 };
            all.push((at, count, *stored));
            // Some runs of the same kind follow each other without a gap.
            at += count + (count % 3);
            total += count;
        }
        let class = if *is_demand { Class::Demand } else { Class::Bulk };
        ids.push(server.block(class, map(&all)));
    }
    (ids, total)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever order, duplicates and losses: what comes out is right and comes once, what is complete comes out, and what
    /// was lost is asked for until it is there.
    #[test]
    fn every_page_comes_once_and_right(
        seed: u64,
        payload in prop::sample::select(vec![512_u16, 1448, 8948, 61440]),
        blocks in blocks(),
        loss in prop::sample::select(vec![0.0_f64, 0.02, 0.3, 0.9]),
        wrap: bool,
        batch in 1..100_usize,
    ) {
        let mut rng = Rng::with_seed(seed);
        let edge = Serial::new(if wrap { u32::MAX - 3 } else { 5 });
        let mut server = Server::new(payload, Start { seq: edge, next_block: [edge; 2] });
        let mut clone = Clone::of(&server);
        let (ids, total) = make(&mut server, &blocks, 20);
        let mut sent = Vec::new();
        for id in &ids {
            sent.extend(server.data(*id).into_iter().map(|datagram| (*id, datagram)));
        }
        let mut whole = ids.clone();
        sent.retain(|(id, _)| {
            let there = rng.f64() >= loss;
            whole.retain(|block| there || block != id);
            there
        });
        for _ in 0..sent.len() / 4 {
            sent.push(sent[rng.usize(..sent.len())].clone());
        }
        rng.shuffle(&mut sent);
        for batch in sent.chunks(batch) {
            batch.iter().for_each(|(_, datagram)| clone.intake.handle(clone.now, datagram));
            clone.take();
            clone.now += Duration::from_micros(rng.u64(..300));
        }
        for id in &whole {
            for (frames, _) in server.of(*id).1.runs() {
                prop_assert!(frames.frames().all(|gfn| clone.frames.contains_key(&gfn.index())), "{id:?}");
            }
        }
        prop_assert!(clone.frames.values().all(|times| *times == 1));
        // Repairs are lost too.
        for _ in 0..40 {
            clone.hear([server.heartbeat()]);
            for lack in clone.asked(ms(60)) {
                let parity = rng.bool();
                let mut repair = server.repair(&lack, parity);
                repair.retain(|_| rng.f64() >= loss.min(0.5));
                clone.hear(repair);
            }
        }
        let seen: Vec<BlockId> = sent.iter().map(|(id, _)| *id).collect();
        let expected = |id: &BlockId| id.class == Class::Bulk || seen.contains(id);
        if ids.iter().all(expected) && clone.intake.stats().given_up == 0 {
            prop_assert_eq!(clone.frames.len() as u64, total);
        }
        prop_assert!(loss > 0.5 || clone.intake.stats().given_up == 0);
        prop_assert!(clone.frames.values().all(|times| *times == 1));
        prop_assert_eq!(clone.intake.stats().dropped.total(), clone.intake.stats().dropped.replayed);
        // Nothing is left but the heartbeat's silence.
        clone.wait(ms(1000));
        prop_assert_eq!(clone.intake.next_timeout(), None);
    }

    /// Datagrams that somebody made up or changed neither break anything nor go uncounted.
    #[test]
    fn foreign_bytes_are_survived(
        seed: u64,
        changes in prop::collection::vec((0..60_usize, 0..56_usize, any::<u8>()), 0..200),
    ) {
        let mut rng = Rng::with_seed(seed);
        let mut server = Server::new(1448, Start::default());
        let mut clone = Clone::new(ReceiverConfig { max_blocks: 8, ..config(&server) });
        let a = server.block(Class::Bulk, map(&[(0, 12, true), (300, 9, false)]));
        let b = server.block(Class::Demand, map(&[(500, 2, true)]));
        let mut datagrams = server.data(a);
        datagrams.extend(server.data(b));
        datagrams.extend(server.shards(a, ShardKind::Parity, 0..3));
        datagrams.push(server.heartbeat());
        datagrams.push(encoded(&Datagram::Pulse(server.pulse(PulseKind::End, 1))));
        datagrams.push(server.confirm(a, Answer::Parity(3)));
        datagrams.push(server.confirm(b, Answer::Originals(ShardSet::first(3))));
        for (at, byte, value) in changes {
            let at = at % datagrams.len();
            let mut datagram = datagrams[at].clone();
            // Of the headers and the map alone, so that bytes of pages stay right.
            let byte = byte % datagram.len().min(24 + 32);
            datagram[byte] = value;
            if rng.u8(..) < 16 {
                datagram.truncate(rng.usize(..datagram.len()));
            }
            clone.intake.handle(clone.now, &datagram);
            if rng.bool() {
                clone.intake.handle(clone.now, &datagrams[rng.usize(..datagrams.len())]);
            }
            while clone.intake.poll(clone.now).is_some() {}
            clone.now += Duration::from_micros(rng.u64(..5000));
            prop_assert!(clone.intake.assembler_len() <= 8 + Receiver::MAX_UNTAKEN);
        }
    }
}
