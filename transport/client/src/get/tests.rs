use std::time::Duration;

use futures::StreamExt as _;
use kvasir_proto::assembly;
use kvasir_types::{DType, ExtentIdx, Planes, Slice, TokenRange};
use v1::get_response::Message;

use super::*;
use crate::Endpoint;

fn layout() -> KvLayout {
    KvLayout::new(2, 1, Planes::symmetric(8), 16, DType::F16).unwrap()
}

fn header(chunks: usize) -> Message {
    let info = v1::ChunkInfo {
        layout: Some(v1::Layout::from(&layout())),
        level: 0,
        tier: v1::Tier::Memory.into(),
    };
    Message::Header(v1::GetHeader {
        chunks: vec![info; chunks],
        cut: false,
    })
}

fn layer(layer: u16, chunk: u32) -> Message {
    let data = Bytes::from(vec![7; layout().layer_bytes()]);
    let checksum = Checksum::of(&data);
    let piece = assembly::pieces(ExtentIdx(layer.into()), data, checksum).next();
    Message::Piece(v1::ChunkPiece { chunk, piece })
}

fn damaged(index: u16, chunk: u32) -> Message {
    let Message::Piece(mut piece) = layer(index, chunk) else {
        unreachable!("`layer` makes pieces");
    };
    piece.piece.as_mut().unwrap().checksum ^= 1;
    Message::Piece(piece)
}

fn lost(chunk: u32) -> Message {
    Message::Lost(v1::ChunkLost {
        chunk,
        reason: v1::chunk_lost::Reason::Device.into(),
    })
}

async fn open(messages: Vec<Message>, wanted: Wanted) -> Result<LayerStream, CallError> {
    let stream = futures::stream::iter(messages.into_iter().map(|message| {
        Ok(v1::GetResponse {
            message: Some(message),
        })
    }));
    let origin = Origin(Endpoint::default());
    let deadline = Deadline::after(Duration::from_secs(5));
    LayerStream::over_grpc(origin, deadline, stream, 3, wanted).await
}

/// The events as text: `layer/chunk`, or `-chunk` for a loss.
async fn events(messages: Vec<Message>) -> Result<String, CallError> {
    let mut stream = open(messages, Wanted::default()).await?;
    let mut seen = Vec::new();
    while let Some(event) = stream.next().await? {
        seen.push(match event {
            GetEvent::Layer { chunk, layer, .. } => format!("{layer}/{chunk}"),
            GetEvent::Prelude { chunk, .. } => format!("p/{chunk}"),
            GetEvent::Lost { chunk, .. } => format!("-{chunk}"),
        });
    }
    Ok(seen.join(" "))
}

fn protocol<T>(result: Result<T, CallError>) -> ProtocolError {
    match result {
        Err(CallError::Protocol(error)) => error,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("accepted"),
    }
}

#[tokio::test]
async fn layers_come_layer_major() {
    let whole = vec![
        header(2),
        layer(0, 0),
        layer(0, 1),
        layer(1, 0),
        layer(1, 1),
    ];
    assert_eq!(events(whole).await.unwrap(), "0/0 0/1 1/0 1/1");
    assert_eq!(events(vec![header(0)]).await.unwrap(), "");
}

#[tokio::test]
async fn a_loss_takes_later_chunks_with_it() {
    let messages = vec![header(3), layer(0, 0), lost(1), layer(1, 0)];
    assert_eq!(events(messages).await.unwrap(), "0/0 -1 1/0");
    let messages = vec![header(2), layer(0, 0), layer(0, 1), lost(1), layer(1, 0)];
    assert_eq!(events(messages).await.unwrap(), "0/0 0/1 -1 1/0");
    let messages = vec![header(2), layer(0, 0), lost(0)];
    assert_eq!(events(messages).await.unwrap(), "0/0 -0");
}

#[tokio::test]
async fn bytes_that_fail_their_checksum_are_a_loss() {
    let messages = vec![
        header(3),
        layer(0, 0),
        damaged(0, 1),
        layer(0, 2),
        layer(1, 0),
    ];
    assert_eq!(events(messages).await.unwrap(), "0/0 -1 1/0");
}

#[tokio::test]
async fn broken_streams_are_told_apart() {
    let wrong = vec![header(2), layer(0, 1)];
    assert!(matches!(
        protocol(events(wrong).await),
        ProtocolError::Order { got: 1, due: 0, .. }
    ));
    let wrong = vec![header(2), layer(0, 7)];
    assert!(matches!(
        protocol(events(wrong).await),
        ProtocolError::Order { got: 7, .. }
    ));
    let wrong = vec![header(2), layer(1, 0)];
    assert!(matches!(
        protocol(events(wrong).await),
        ProtocolError::Field(field) if field.field == "piece.extent"
    ));
    let short = vec![header(1), layer(0, 0)];
    assert_eq!(
        protocol(events(short).await),
        ProtocolError::Truncated {
            chunk: 0,
            extent: ExtentIdx(1)
        }
    );
    let twice = vec![header(1), header(1)];
    assert_eq!(protocol(events(twice).await), ProtocolError::Header);
    let headless = vec![layer(0, 0)];
    assert_eq!(protocol(events(headless).await), ProtocolError::Header);
    assert_eq!(
        protocol(events(vec![header(4)]).await),
        ProtocolError::Count { asked: 3, got: 4 }
    );
}

#[tokio::test]
async fn only_the_asked_layers_are_due() {
    let wanted = |start, end| Wanted {
        layers: LayerRange::new(start, end).ok(),
        ..Wanted::default()
    };
    let messages = vec![header(1), layer(1, 0)];
    let mut stream = open(messages, wanted(1, 2)).await.unwrap();
    assert!(stream.next().await.unwrap().is_some());
    assert_eq!(stream.next().await.unwrap(), None);
    assert!(matches!(
        protocol(open(vec![header(1)], wanted(1, 3)).await),
        ProtocolError::Field(field) if field.field == "layers"
    ));
}

#[tokio::test]
async fn a_daemon_that_cuts_nothing_sends_whole_layers() {
    let wanted = Wanted {
        slice: Some(Slice {
            heads: None,
            tokens: TokenRange::new(0, 1).ok(),
        }),
        ..Wanted::default()
    };
    let messages = vec![header(1), layer(0, 0), layer(1, 0)];
    let mut stream = open(messages, wanted).await.unwrap();
    assert_eq!(stream.slice(0), None);
    let Some(GetEvent::Layer { parts, .. }) = stream.next().await.unwrap() else {
        panic!("a layer is due");
    };
    assert_eq!(parts[0].len(), layout().layer_bytes());
}

#[tokio::test]
async fn a_silent_daemon_does_not_outlast_the_deadline() {
    let first = v1::GetResponse {
        message: Some(header(1)),
    };
    let stream = futures::stream::iter([Ok(first)]).chain(futures::stream::pending());
    let origin = Origin(Endpoint::default());
    let deadline = Deadline::after(Duration::from_millis(30));
    let mut stream = LayerStream::over_grpc(origin, deadline, stream, 1, Wanted::default())
        .await
        .unwrap();
    for _ in 0..2 {
        assert!(matches!(
            stream.next().await,
            Err(CallError::DeadlineExceeded)
        ));
    }
}
