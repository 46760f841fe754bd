use super::*;

#[test]
fn the_first_report_follows_the_first_datagram_and_tells_all() {
    let server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    clone.wait(ms(1000));
    assert!(clone.reports.is_empty(), "nobody knows yet whether anything arrives");
    clone.hear([server.heartbeat()]);
    clone.wait(ms(5));
    assert_eq!(clone.reports.len(), 1);
    assert_eq!(clone.reports[0].1.as_ref().map(ChunkSet::len), Some(40));
    clone.wait(ms(300));
    let told: Vec<_> = clone.reports.iter().map(|(at, lacks)| (at.as_millis() < 1030, lacks.is_some())).collect();
    assert_eq!(told[..4], [(true, true), (true, true), (true, true), (false, false)], "the first may be lost");
}

#[test]
fn reports_are_regular_while_something_comes() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    clone.hear([server.heartbeat()]);
    clone.wait(ms(10));
    for at in 0..100 {
        let id = server.block(Class::Demand, map(&[(at, 1, true)]));
        let data = server.data(id);
        clone.hear(data);
        clone.wait(ms(10));
    }
    let busy = clone.reports.len();
    assert!((80..=125).contains(&busy), "{busy} in a second");
    for _ in 0..4 {
        clone.hear([server.heartbeat()]);
        clone.wait(ms(250));
    }
    let idle = clone.reports.len() - busy;
    assert!((8..=14).contains(&idle), "{idle} in a second");
    clone.wait(ms(5000));
    assert!(clone.reports.len() - busy - idle <= 8, "none once it is silent");
}

#[test]
fn a_channel_that_wakes_is_reported_of_soon() {
    let mut server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    let resting = Pulse { report_interval: ms(250), ..server.pulse(PulseKind::Heartbeat, 0) };
    clone.hear([encoded(&Datagram::Pulse(resting))]);
    clone.wait(ms(50));
    clone.reports.clear();
    let id = server.block(Class::Demand, map(&[(0, 1, true)]));
    let data = server.data(id);
    clone.hear(data);
    clone.hear([server.heartbeat()]);
    clone.wait(ms(13));
    assert_eq!(clone.reports.len(), 1);
}

#[test]
fn reports_come_early_after_so_many_bytes() {
    let mut server = Server::new(61440, Start::default());
    let mut clone = Clone::of(&server);
    let pulse = Pulse { report_bytes: 1 << 20, report_interval: ms(1000), ..server.pulse(PulseKind::Heartbeat, 0) };
    clone.hear([encoded(&Datagram::Pulse(pulse))]);
    clone.wait(ms(50));
    clone.reports.clear();
    for at in 0..17 {
        let id = server.block(Class::Bulk, map(&[(at * 256, 256, true)]));
        let data = server.data(id);
        clone.hear(data);
    }
    assert!((15..=17).contains(&clone.reports.len()), "{}", clone.reports.len());
}

#[test]
fn a_question_is_answered_once() {
    let mut server = Server::new(1448, Start::default());
    server.members = 100;
    let mut clone = Clone::of(&server);
    clone.hear([server.heartbeat()]);
    clone.wait(ms(300));
    clone.reports.clear();
    let end = |burst, endgame| encoded(&Datagram::Pulse(Pulse { endgame, ..server.pulse(PulseKind::End, burst) }));
    for _ in 0..3 {
        clone.hear([end(7, false)]);
        clone.wait(ms(20));
    }
    let tell = |reports: &[(Duration, Option<ChunkSet>)]| reports.iter().filter(|(_, lacks)| lacks.is_some()).count();
    assert_eq!(tell(&clone.reports), 1);
    clone.hear([end(8, true), end(8, true)]);
    clone.wait(ms(20));
    assert_eq!(tell(&clone.reports), 2);
    clone.hear([server.heartbeat()]);
    let ended = |endgame| ChannelEvent::BurstEnded { endgame };
    assert_eq!(clone.events, [ChannelEvent::Live, ended(false), ended(true), ended(false)]);
}

#[test]
fn a_change_of_mind_is_told_soon() {
    let server = Server::new(1448, Start::default());
    let mut clone = Clone::of(&server);
    clone.intake.set_lacks(ms(0), None);
    clone.hear([server.heartbeat()]);
    clone.wait(ms(50));
    assert!(clone.reports.iter().all(|(_, lacks)| lacks.is_none()));
    clone.reports.clear();
    clone.intake.set_lacks(clone.now, everything(&server.channel));
    clone.wait(ms(2));
    assert_eq!(clone.reports.iter().filter(|(_, lacks)| lacks.is_some()).count(), 1);
}

#[test]
fn a_report_tells_losses_and_the_time_since_the_pulse() {
    let mut server = Server::new(1448, Start { seq: Serial::new(u32::MAX), ..Start::default() });
    let mut clone = Clone::of(&server);
    let id = server.block(Class::Bulk, map(&[(0, 20, true)]));
    let data = server.data(id);
    let count = data.len() as u32;
    clone.intake.set_overflow(3);
    clone.hear(data[2..].to_vec());
    clone.hear([server.heartbeat()]);
    let report = clone.last_report(ms(30)).unwrap();
    assert_eq!((report.next_seq, report.received, report.lost), (server.seq, count - 2, 2));
    assert_eq!((report.overflow, report.buffer, report.missing), (3, 8 << 20, FRAMES as u32));
    assert_eq!(report.echo, ms(5));
    assert!(report.held > ms(10) && report.held <= ms(30), "{report:?}");
}
