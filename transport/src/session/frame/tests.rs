//! Frames, split anywhere, and bytes that are none.

use proptest::prelude::*;

use super::*;

fn body() -> impl Strategy<Value = Bytes> {
    prop::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from)
}

fn range() -> impl Strategy<Value = Range<u64>> {
    (0..u64::MAX, any::<u64>()).prop_map(|(start, length)| {
        let end = start.saturating_add(length).max(start + 1);
        start..end
    })
}

fn frames() -> impl Strategy<Value = Frame> {
    let request = || any::<u64>().prop_map(RequestId);
    let reason = prop_oneof![
        Just(RefuseReason::Answer),
        Just(RefuseReason::Busy),
        Just(RefuseReason::Draining)
    ];
    let ranges = prop::collection::vec(range(), 0..5);
    prop_oneof![
        any::<((u32, u32), u64, u64)>().prop_map(|(versions, features, credit)| {
            Frame::Hello(Hello {
                versions,
                features: Features(features),
                credit,
            })
        }),
        (request(), any::<u32>(), any::<u64>(), ranges, body()).prop_map(
            |(request, priority, budget_ms, missing, body)| Frame::Ask(Ask {
                request,
                priority,
                budget_ms,
                missing,
                body,
            })
        ),
        (request(), any::<u64>(), body()).prop_map(|(request, total, body)| {
            Frame::Describe {
                request,
                total,
                body,
            }
        }),
        (request(), reason, body()).prop_map(|(request, reason, body)| Frame::Refuse {
            request,
            reason,
            body,
        }),
        (request(), 0..u64::MAX / 2, body()).prop_map(|(request, offset, bytes)| {
            Frame::Data {
                request,
                offset,
                bytes,
            }
        }),
        (request(), range(), any::<u32>()).prop_map(|(request, range, reason)| Frame::Lost {
            request,
            range,
            reason,
        }),
        (request(), any::<([u32; 4], Option<u32>)>()).prop_map(|(request, (numbers, key))| {
            let [offset, loan, at, length] = numbers.map(u64::from);
            Frame::Lend(Loan {
                request,
                offset,
                loan,
                at,
                length,
                key,
            })
        }),
        any::<u64>().prop_map(|loan| Frame::Return { loan }),
        (request(), any::<u32>())
            .prop_map(|(request, priority)| Frame::Prioritise { request, priority }),
        request().prop_map(|request| Frame::Finish { request }),
        any::<u64>().prop_map(|limit| Frame::Credit { limit }),
        any::<u64>().prop_map(|nonce| Frame::Ping { nonce }),
        any::<u64>().prop_map(|nonce| Frame::Pong { nonce }),
        Just(Frame::Drain),
    ]
}

/// All frames in bytes that come `step` at a time, pieces of data put together.
fn read(bytes: &Bytes, step: usize) -> Result<Vec<Frame>, FrameError> {
    let mut reader = FrameReader::default();
    let mut frames: Vec<Frame> = Vec::new();
    for at in (0..bytes.len()).step_by(step) {
        let mut piece = bytes.slice(at..bytes.len().min(at + step));
        while let Some(frame) = reader.next(&mut piece)? {
            match (frames.last_mut(), frame) {
                (
                    Some(Frame::Data {
                        request,
                        offset,
                        bytes,
                    }),
                    Frame::Data {
                        request: same,
                        offset: at,
                        bytes: more,
                    },
                ) if *request == same && *offset + bytes.len() as u64 == at => {
                    *bytes = [bytes.as_ref(), &more].concat().into();
                }
                (_, frame) => frames.push(frame),
            }
        }
    }
    Ok(frames)
}

proptest! {
    #[test]
    fn frames_come_as_they_were_sent(frame in frames(), step in 1usize..50) {
        let bytes = Bytes::from(frame.encode().concat());
        let twice = Bytes::from([bytes.as_ref(), &Frame::Drain.encode().concat()].concat());
        prop_assert_eq!(read(&twice, step), Ok(vec![frame, Frame::Drain]));
    }

    #[test]
    fn bytes_that_are_no_frames_are_errors_or_wait_for_more(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        frame in frames(),
        at: usize,
        with: u8,
    ) {
        drop(read(&Bytes::from(bytes), 7));
        let mut bytes = frame.encode().concat();
        let at = at % bytes.len();
        bytes[at] = with;
        drop(read(&Bytes::from(bytes), 7));
    }
}

fn of(header: &wire::Header) -> Result<Vec<Frame>, FrameError> {
    let message = header.encode_to_vec();
    let length = u16::try_from(message.len()).unwrap().to_le_bytes();
    read(&Bytes::from([&length[..], &message].concat()), 1000)
}

#[test]
fn what_a_frame_may_not_say_is_refused_before_it_is_taken() {
    let header = |kind, payload| wire::Header {
        payload,
        kind: Some(kind),
    };
    let data = |offset| Kind::Data(wire::Data { request: 1, offset });
    let over = |bytes, limit| Err(FrameError::Length { bytes, limit });
    assert_eq!(
        of(&header(data(0), MAX_DATA + 1)),
        over(MAX_DATA + 1, MAX_DATA)
    );
    assert_eq!(of(&header(data(u64::MAX), 1)), Err(FrameError::Range));
    let ping = Kind::Ping(wire::Number { number: 1 });
    assert_eq!(of(&header(ping, 1)), over(1, 0));
    let ask = |missing| {
        Kind::Ask(wire::Ask {
            missing,
            ..wire::Ask::default()
        })
    };
    assert_eq!(
        of(&header(ask(vec![]), MAX_BODY + 1)),
        over(MAX_BODY + 1, MAX_BODY)
    );
    for missing in [
        vec![1],
        vec![2, 2],
        vec![3, 2],
        [1, 2].repeat(MAX_RANGES + 1),
    ] {
        assert_eq!(of(&header(ask(missing), 0)), Err(FrameError::Range));
    }
    let none = wire::Header {
        payload: 0,
        kind: None,
    };
    assert_eq!(of(&none), Err(FrameError::Header));
}
