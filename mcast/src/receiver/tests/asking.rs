use super::*;

fn sent(server: &mut Server, class: Class, first: u64, pages: u64) -> (BlockId, Vec<Vec<u8>>) {
    let id = server.block(class, map(&[(first, pages, true)]));
    let data = server.data(id);
    (id, data)
}

fn without(mut data: Vec<Vec<u8>>, lost: &[usize]) -> Vec<Vec<u8>> {
    lost.iter().rev().for_each(|at| {
        data.remove(*at);
    });
    data
}

#[test]
fn demand_is_asked_for_by_the_gap() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    clone.hear([server.heartbeat()]);
    let (id, data) = sent(&mut server, Class::Demand, 0, 16);
    clone.hear(without(data[..12].to_vec(), &[4, 5]));
    assert!(clone.asked(Duration::from_micros(900)).is_empty(), "it may be late");
    let asked = clone.asked(ms(1));
    assert_eq!(asked, [Lack { block: id, need: 2, missing: [4, 5].into_iter().collect() }]);
    let repair = server.repair(&asked[0], false);
    clone.hear(repair);
    clone.hear(data[12..].to_vec());
    assert!(clone.asked(ms(500)).is_empty());
    assert_eq!(clone.frames.len(), 16);
    assert_eq!((clone.intake.stats().nacks, clone.intake.stats().repaired, clone.intake.stats().lost), (1, 2, 2));
}

#[test]
fn what_is_only_late_is_not_asked_for() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    clone.hear([server.heartbeat()]);
    let (_, data) = sent(&mut server, Class::Demand, 0, 4);
    clone.hear(without(data.clone(), &[3]));
    clone.wait(Duration::from_micros(900));
    clone.hear(data[3..4].to_vec());
    assert!(clone.asked(ms(500)).is_empty());
}

#[test]
fn bulk_is_asked_for_when_it_ends() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    clone.hear([server.heartbeat()]);
    let (first, data) = sent(&mut server, Class::Bulk, 0, 20);
    clone.hear(without(data, &[0, 7, 30]));
    assert!(clone.asked(ms(50)).is_empty());
    let (second, data) = sent(&mut server, Class::Bulk, 20, 20);
    let last = data.len() - 1;
    clone.hear(data[..last].to_vec());
    let asked = clone.asked(ms(5));
    assert_eq!(asked, [Lack { block: first, need: 3, missing: [0, 7, 30].into_iter().collect() }]);
    assert!(clone.frames.len() < 20 && !clone.frames.is_empty(), "what is there comes out");
    clone.hear([server.heartbeat()]);
    let parity = server.repair(&asked[0], true);
    clone.hear(parity);
    assert_eq!(clone.intake.stats().recovered, 3);
    assert_eq!(clone.asked(ms(5)), [Lack { block: second, need: 1, missing: [last as u8].into_iter().collect() }]);
}

#[test]
fn one_nack_asks_for_all_that_is_due() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    server.members = 50;
    clone.hear([server.heartbeat()]);
    for at in 0..50 {
        let (_, data) = sent(&mut server, Class::Bulk, at * 20, 20);
        clone.hear(without(data, &[3]));
    }
    clone.hear([server.heartbeat()]);
    clone.asked(ms(6));
    let sizes: Vec<usize> = clone.nacks.iter().map(Vec::len).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 50);
    assert!(sizes.len() <= 2, "{sizes:?}");
}

#[test]
fn a_confirmation_that_suffices_spares_the_nack() {
    let mut server = Server::new(1448, Start::default());
    server.members = 8;
    let mut clone = Clone::of(&server);
    clone.hear([server.heartbeat()]);
    let (id, data) = sent(&mut server, Class::Bulk, 0, 20);
    clone.hear(without(data, &[3, 4]));
    clone.hear([server.heartbeat(), server.confirm(id, Answer::Parity(2))]);
    assert!(clone.asked(ms(6)).is_empty());
    assert_eq!(clone.intake.stats().suppressed, 1);
    assert_eq!(clone.asked(ms(6)).len(), 1, "nothing came of it");
    clone.hear([server.confirm(id, Answer::Originals(ShardSet::first(4)))]);
    assert_eq!(clone.asked(ms(100))[0].need, 2, "it lacks another one");
    let repair = server.shards(id, ShardKind::Repair, [3]);
    clone.hear([server.confirm(id, Answer::Parity(1))]);
    clone.hear(repair);
    assert!(clone.asked(ms(6)).is_empty());
}

#[test]
fn nobody_asks_for_ever() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    clone.hear([server.heartbeat()]);
    let (_, data) = sent(&mut server, Class::Bulk, 0, 20);
    clone.hear(without(data, &[3]));
    clone.hear([server.heartbeat()]);
    assert_eq!(clone.asked(ms(10_000)).len(), 6);
    assert_eq!((clone.intake.stats().given_up, clone.intake.assembler_len()), (1, 0));
    assert_eq!(clone.frames.len(), 19, "all but what the shard has parts of");
}

#[test]
fn what_is_gone_is_given_up() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    clone.hear([server.heartbeat()]);
    let (first, data) = sent(&mut server, Class::Bulk, 0, 20);
    clone.hear(without(data, &[3]));
    let (_, data) = sent(&mut server, Class::Bulk, 20, 20);
    clone.hear(without(data, &[3]));
    clone.hear([server.heartbeat(), server.confirm(first, Answer::Gone)]);
    assert_eq!(clone.asked(ms(5)).len(), 1);
    let oldest_block = server.next;
    clone.hear([encoded(&Datagram::Pulse(Pulse { oldest_block, ..server.pulse(PulseKind::Heartbeat, 0) }))]);
    assert!(clone.asked(ms(500)).is_empty());
    assert_eq!((clone.intake.stats().given_up, clone.intake.assembler_len()), (2, 0));
}

#[test]
fn of_what_was_lost_as_a_whole_some_bulk_is_asked_for() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    clone.hear([server.heartbeat()]);
    for at in 0..30 {
        sent(&mut server, Class::Demand, at, 1);
        sent(&mut server, Class::Bulk, 100 + at, 1);
    }
    clone.hear([server.heartbeat()]);
    let asked = clone.asked(ms(3));
    let numbers: Vec<_> = asked.iter().map(|lack| (lack.need, lack.block)).collect();
    assert_eq!(numbers, (14..30).map(|at| (255, bulk(at))).collect::<Vec<_>>());
    for lack in &asked {
        let repair = server.repair(lack, false);
        clone.hear(repair);
    }
    assert_eq!(clone.frames.len(), 16);
    assert!(clone.asked(ms(100)).is_empty());
}

#[test]
fn what_is_not_wanted_is_not_asked_for() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    clone.hear([server.heartbeat()]);
    let mut lacks = everything(&server.channel).unwrap();
    lacks.chunks.remove(0);
    clone.intake.set_lacks(clone.now, Some(lacks));
    let (_, data) = sent(&mut server, Class::Bulk, 0, 20);
    clone.hear(without(data, &[3]));
    let (id, data) = sent(&mut server, Class::Bulk, 250, 10);
    clone.hear(without(data, &[3]));
    clone.hear([server.heartbeat()]);
    assert_eq!(clone.asked(ms(3)).iter().map(|lack| lack.block).collect::<Vec<_>>(), [id]);
    clone.intake.set_lacks(clone.now, None);
    let (_, data) = sent(&mut server, Class::Bulk, 1000, 10);
    clone.hear(without(data, &[3]));
    let (id, data) = sent(&mut server, Class::Demand, 300, 10);
    clone.hear(without(data, &[3]));
    clone.hear([server.heartbeat()]);
    assert_eq!(clone.asked(ms(100)).iter().map(|lack| lack.block).next(), Some(id));
    assert_eq!(demand(0), id);
    assert!((1002..1010).all(|gfn| clone.frames.contains_key(&gfn)), "what came of it comes out");
}
