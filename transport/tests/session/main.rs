//! Sessions over links that delay, lose, repeat, reorder and break.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod link;
mod recorded;

use std::time::Duration;

use bytes::Bytes;
use kvasir_transport::session::{
    Config, FailReason, Features, FetchEvent, Fetcher, Frame, Hello, Holder, HolderEvent,
    RefuseReason, RequestId, Violation,
};
use link::{Pair, Quality};
use proptest::prelude::*;

const LOSSY: Config = Config {
    versions: kvasir_transport::session::VERSIONS,
    features: Features(0),
    credit: 256 << 10,
    resend_after: Some(Duration::from_millis(80)),
    ping_every: Duration::from_secs(1),
    read_ahead: 128 << 10,
    piece: 4 << 10,
    whole: false,
    requests: 256,
    linger: Duration::from_secs(5),
};

fn reliable() -> Config {
    Config {
        resend_after: None,
        ..LOSSY
    }
}

const fn ms(number: u64) -> Duration {
    Duration::from_millis(number)
}

#[test]
fn what_is_asked_for_comes_in_order() {
    let mut pair = Pair::new(reliable(), Quality::GOOD, 1);
    let (name, none) = (pair.have(1_000_000), pair.have(0));
    let requests = [pair.fetch(&name, 0, None), pair.fetch(&none, 0, None)];
    let refused = pair.fetch(&Bytes::from_static(b"nothing"), 0, None);
    pair.run(pair.after(ms(500)));
    for (request, name) in requests.into_iter().zip([&name, &none]) {
        let got = &pair.got[&request];
        assert_eq!(got.bytes, pair.things[name]);
        assert!(got.order.is_sorted());
        assert_eq!(
            got.ended.as_ref().unwrap().0,
            FetchEvent::Complete { request }
        );
    }
    assert_eq!(pair.sent, 1_000_000);
    let event = FetchEvent::Refused {
        request: refused,
        reason: RefuseReason::Answer,
        body: Bytes::from_static(b"unknown"),
    };
    assert_eq!(pair.got[&refused].ended.as_ref().unwrap().0, event);
    // Five there, five back, and nothing else is on the link.
    assert_eq!(pair.fetcher.round_trip().map(|it| it.as_millis()), Some(10));
    assert!(pair.holder.is_idle());
}

#[test]
fn credit_bounds_what_is_under_way() {
    let slow = Quality {
        bytes_per_second: 1e6,
        ..Quality::GOOD
    };
    let mut pair = Pair::new(reliable(), slow, 1);
    let name = pair.have(1_000_000);
    let request = pair.fetch(&name, 0, None);
    pair.run(pair.after(ms(2000)));
    assert_eq!(pair.got[&request].bytes, pair.things[&name]);
    assert!(
        pair.most_under_way <= LOSSY.credit + 4096,
        "{}",
        pair.most_under_way
    );
}

#[test]
fn what_matters_more_overtakes() {
    let slow = Quality {
        bytes_per_second: 1e6,
        ..Quality::GOOD
    };
    let mut config = reliable();
    config.credit = 16 << 10;
    let mut pair = Pair::new(config, slow, 1);
    let (large, small) = (pair.have(1_000_000), pair.have(10_000));
    let prefetch = pair.fetch(&large, 0, None);
    pair.run(pair.after(ms(300)));
    let urgent = pair.fetch(&small, 1, None);
    let same = pair.fetch(&small, 0, Some(ms(60_000)));
    pair.run(pair.after(ms(3000)));
    let ended = |request| pair.got[&request].ended.clone().unwrap();
    let waited = ended(urgent).1 - pair.after(ms(300));
    // A round trip, what was under way, and its own bytes.
    assert!(waited < ms(10 + 17 + 11 + 10), "{waited:?}");
    // The one with a deadline comes before the one without.
    assert!(ended(same).1 < ended(prefetch).1);
    assert_eq!(
        ended(prefetch).0,
        FetchEvent::Complete { request: prefetch }
    );
}

#[test]
fn what_nobody_takes_does_not_hold_up_what_matters_more() {
    let mut pair = Pair::new(reliable(), Quality::GOOD, 1);
    let (large, small) = (pair.have(1_000_000), pair.have(10_000));
    pair.takes = false;
    let prefetch = pair.fetch(&large, 0, None);
    pair.run(pair.after(ms(300)));
    assert_eq!(pair.sent, LOSSY.credit * 3 / 4);
    let urgent = pair.fetch(&small, 1, None);
    pair.run(pair.after(ms(600)));
    assert_eq!(pair.got[&urgent].bytes, pair.things[&small]);
    assert_eq!(pair.got[&prefetch].ended, None);
}

#[test]
fn priority_can_change_and_requests_can_be_given_up() {
    let slow = Quality {
        bytes_per_second: 1e6,
        ..Quality::GOOD
    };
    let mut config = reliable();
    config.credit = 16 << 10;
    let mut pair = Pair::new(config, slow, 1);
    let name = pair.have(300_000);
    let requests = [(); 3].map(|()| pair.fetch(&name, 0, None));
    pair.run(pair.after(ms(100)));
    pair.fetcher.prioritise(requests[2], 5);
    pair.fetcher.cancel(requests[0]);
    pair.run(pair.after(ms(5000)));
    let ended = |at: usize| pair.got[&requests[at]].ended.clone();
    assert_eq!(ended(0), None);
    assert!(ended(2).unwrap().1 < ended(1).unwrap().1);
    // Of the one that was given up, no more than was under way.
    assert!(pair.sent < 600_000 + 150_000, "{}", pair.sent);
    assert!(pair.holder.is_idle());
}

#[test]
fn a_deadline_ends_a_request_at_both_ends() {
    let slow = Quality {
        bytes_per_second: 1e5,
        ..Quality::GOOD
    };
    let mut pair = Pair::new(reliable(), slow, 1);
    let name = pair.have(1_000_000);
    let request = pair.fetch(&name, 0, Some(ms(500)));
    pair.run(pair.after(ms(10_000)));
    let (event, at) = pair.got[&request].ended.clone().unwrap();
    let reason = FailReason::Expired;
    assert_eq!(event, FetchEvent::Failed { request, reason });
    assert_eq!(at, pair.after(ms(500)));
    assert!(pair.holder.is_idle());
    assert!(pair.sent < 400_000, "{}", pair.sent);
}

#[test]
fn a_new_connection_goes_on_with_what_is_missing() {
    let slow = Quality {
        bytes_per_second: 1e6,
        ..Quality::GOOD
    };
    let mut pair = Pair::new(reliable(), slow, 1);
    let name = pair.have(1_000_000);
    let request = pair.fetch(&name, 0, None);
    pair.run(pair.after(ms(500)));
    let before = pair.fetcher.progress(request).unwrap();
    assert!((300_000..700_000).contains(&before.received));
    pair.sent = 0;
    pair.reconnect();
    pair.run(pair.after(ms(3000)));
    assert_eq!(pair.got[&request].bytes, pair.things[&name]);
    assert_eq!(pair.sent, 1_000_000 - before.received);
}

#[test]
fn what_changed_meanwhile_is_not_put_together() {
    let slow = Quality {
        bytes_per_second: 1e6,
        ..Quality::GOOD
    };
    let mut pair = Pair::new(reliable(), slow, 1);
    let name = pair.have(1_000_000);
    let request = pair.fetch(&name, 0, None);
    pair.run(pair.after(ms(500)));
    pair.things.get_mut(&name).unwrap().truncate(900_000);
    pair.reconnect();
    pair.run(pair.after(ms(3000)));
    let reason = FailReason::Changed;
    let (event, _) = pair.got[&request].ended.clone().unwrap();
    assert_eq!(event, FetchEvent::Failed { request, reason });
}

#[test]
fn what_cannot_be_read_is_said_to_be_lost() {
    let mut pair = Pair::new(reliable(), Quality::GOOD, 1);
    let name = pair.have(100_000);
    pair.unreadable.insert(name.clone(), 50_000..50_001);
    let request = pair.fetch(&name, 0, None);
    pair.run(pair.after(ms(1000)));
    let got = &pair.got[&request];
    assert_eq!(got.lost, LOSSY.piece);
    assert_eq!(
        got.ended.as_ref().unwrap().0,
        FetchEvent::Complete { request }
    );
}

#[test]
fn a_holder_that_drains_ends_what_it_has() {
    let slow = Quality {
        bytes_per_second: 1e6,
        ..Quality::GOOD
    };
    let mut pair = Pair::new(reliable(), slow, 1);
    let name = pair.have(500_000);
    let first = pair.fetch(&name, 0, None);
    pair.run(pair.after(ms(100)));
    pair.holder.drain();
    // It stands behind what was sent before.
    pair.run(pair.after(ms(400)));
    assert!(pair.fetcher.is_draining() && !pair.holder.is_idle());
    let second = pair.fetch(&name, 0, None);
    pair.run(pair.after(ms(2000)));
    assert_eq!(pair.got[&first].bytes, pair.things[&name]);
    let event = FetchEvent::Refused {
        request: second,
        reason: RefuseReason::Draining,
        body: Bytes::new(),
    };
    assert_eq!(pair.got[&second].ended.as_ref().unwrap().0, event);
    assert!(pair.holder.is_idle());
}

#[test]
fn a_holder_takes_so_many_requests_and_no_more() {
    let mut config = reliable();
    config.requests = 2;
    let mut pair = Pair::new(config, Quality::GOOD, 1);
    let name = pair.have(10_000);
    let requests = [(); 3].map(|()| pair.fetch(&name, 0, None));
    pair.run(pair.after(ms(1000)));
    let event = FetchEvent::Refused {
        request: requests[2],
        reason: RefuseReason::Busy,
        body: Bytes::new(),
    };
    assert_eq!(pair.got[&requests[2]].ended.as_ref().unwrap().0, event);
    assert_eq!(pair.got[&requests[1]].bytes, pair.things[&name]);
}

fn speaking(versions: (u32, u32), features: u64) -> Config {
    Config {
        versions,
        features: Features(features),
        ..Config::default()
    }
}

/// What both ends agree on, or why they do not.
fn meet(fetcher: Config, holder: Config) -> Result<(u32, u64), Violation> {
    let now = std::time::Instant::now();
    let (mut fetcher, mut holder) = (Fetcher::new(fetcher), Holder::new(holder));
    fetcher.connect(now);
    holder.on_frame(now, fetcher.poll_frame().unwrap())?;
    fetcher.on_frame(now, holder.poll_frame(now).unwrap())?;
    let (Some(FetchEvent::Connected(here)), Some(HolderEvent::Connected(there))) =
        (fetcher.poll_event(), holder.poll_event())
    else {
        panic!("both ends know each other");
    };
    assert_eq!(here, there);
    Ok((here.version, here.features.0))
}

#[test]
fn ends_take_the_newest_version_that_both_speak() {
    assert_eq!(
        meet(speaking((1, 3), 0b110), speaking((2, 2), 0b011)),
        Ok((2, 0b010))
    );
    assert_eq!(meet(speaking((1, 1), 1), speaking((1, 2), 1)), Ok((1, 1)));
    let error = meet(speaking((1, 1), 0), speaking((2, 3), 0)).unwrap_err();
    assert!(matches!(error, Violation::Version { .. }), "{error}");
}

#[test]
fn what_a_peer_may_not_do_ends_the_connection() {
    let now = std::time::Instant::now();
    let hello = Frame::Hello(Hello {
        versions: (1, 1),
        features: Features(0),
        credit: 1000,
    });
    let request = RequestId(0);
    let data = |offset, bytes| Frame::Data {
        request,
        offset,
        bytes: Bytes::from(vec![0; bytes]),
    };
    let describe = Frame::Describe {
        request,
        total: 500,
        body: Bytes::new(),
    };
    let after = |frames: &[Frame]| {
        let mut fetcher = Fetcher::new(Config {
            credit: 1000,
            ..Config::default()
        });
        fetcher.connect(now);
        fetcher.fetch(now, Bytes::new(), 0, None);
        let mut taken = Ok(());
        for frame in frames {
            taken = taken.and_then(|()| fetcher.on_frame(now, frame.clone()));
        }
        taken
    };
    assert_eq!(
        after(std::slice::from_ref(&describe)),
        Err(Violation::NoHello)
    );
    assert_eq!(
        after(&[hello.clone(), describe.clone(), data(0, 500)]),
        Ok(())
    );
    let beyond = [hello.clone(), describe.clone(), data(400, 101)];
    assert_eq!(after(&beyond), Err(Violation::Beyond(400)));
    let lost = Frame::Lost {
        request,
        range: 0..501,
        reason: 0,
    };
    assert_eq!(
        after(&[hello.clone(), describe, lost]),
        Err(Violation::Beyond(0))
    );
    assert_eq!(
        after(&[hello.clone(), data(0, 1001)]),
        Err(Violation::Credit)
    );
    let ping = Frame::Ping { nonce: 1 };
    assert_eq!(after(&[hello.clone(), ping.clone()]), Err(Violation::Role));
    let mut holder = Holder::new(Config::default());
    assert_eq!(holder.on_frame(now, ping), Err(Violation::NoHello));
    holder.on_frame(now, hello).unwrap();
    assert_eq!(holder.on_frame(now, Frame::Drain), Err(Violation::Role));
}

/// What was sent for nobody comes back as credit, and no more of it than there was.
#[test]
fn credit_of_what_is_gone_comes_back() {
    let credit = 1000;
    let mut fetcher = Fetcher::new(Config {
        credit,
        ..Config::default()
    });
    fetcher.connect(std::time::Instant::now());
    fetcher.missed(credit).unwrap();
    let frames: Vec<_> = std::iter::from_fn(|| fetcher.poll_frame()).collect();
    let limit = 2 * credit;
    assert_eq!(frames.last(), Some(&Frame::Credit { limit }));
    assert_eq!(fetcher.missed(credit + 1), Err(Violation::Credit));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Over any link, and with any breaks, all bytes come, and no others.
    #[test]
    fn all_comes_over_a_bad_link(
        seed: u64,
        loss in 0.0..0.3f64,
        repeat in 0.0..0.3f64,
        jitter in 0u64..60,
        bandwidth in 3e5..1e8,
        sizes in prop::collection::vec(0usize..60_000, 1..6),
        breaks in prop::collection::vec(1u64..600, 0..4),
    ) {
        let quality = Quality {
            delay: ms(5),
            jitter: ms(jitter),
            loss,
            repeat,
            bytes_per_second: bandwidth,
        };
        let mut pair = Pair::new(LOSSY, quality, seed);
        let things: Vec<_> = sizes.iter().map(|&size| pair.have(size)).collect();
        let requests = things.iter().zip(0u32..).map(|(name, at)| pair.fetch(name, at % 2, None));
        let requests: Vec<_> = requests.collect();
        let mut at = ms(0);
        for after in breaks {
            at += ms(after);
            pair.run(pair.after(at));
            pair.reconnect();
        }
        pair.run(pair.after(at + Duration::from_secs(120)));
        for (request, name) in requests.into_iter().zip(&things) {
            let got = &pair.got[&request];
            prop_assert_eq!(&got.bytes, &pair.things[name]);
            let (event, _) = got.ended.clone().unwrap();
            prop_assert_eq!(event, FetchEvent::Complete { request });
        }
        prop_assert!(pair.holder.is_idle());
    }

    /// A request with a deadline has ended by then, whatever the link does.
    #[test]
    fn deadlines_hold_over_a_bad_link(seed: u64, loss in 0.0..0.9f64, deadline in 1u64..400) {
        let quality = Quality {
            loss,
            bytes_per_second: 1e6,
            ..Quality::GOOD
        };
        let mut pair = Pair::new(LOSSY, quality, seed);
        let name = pair.have(200_000);
        let request = pair.fetch(&name, 0, Some(ms(deadline)));
        pair.run(pair.after(ms(1000)));
        let (_, at) = pair.got[&request].ended.clone().unwrap();
        prop_assert!(at <= pair.after(ms(deadline)));
    }
}
