//! Frames over a Unix socket that both directions of a connection share.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use bytes::{Bytes, BytesMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::{Ended, GREETING, PREAMBLE_BYTES, Token};
use crate::session::{Frame, FrameReader, Violation};

/// Sends all of `out`.
pub(super) async fn send(stream: &UnixStream, out: &mut BytesMut) -> io::Result<()> {
    while !out.is_empty() {
        match stream.try_write(out) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => drop(out.split_to(written)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => stream.writable().await?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Appends a frame.
pub(super) fn put(out: &mut BytesMut, frame: &Frame) {
    for part in frame.encode() {
        out.extend_from_slice(&part);
    }
}

/// Takes frames off a stream, until it ends or `take` fails.
pub(super) async fn receive(
    stream: &UnixStream,
    mut take: impl FnMut(&mut Vec<Frame>) -> Result<(), Violation>,
) -> Result<(), Ended> {
    let mut reader = FrameReader::default();
    let mut buffer = BytesMut::new();
    let mut frames = Vec::new();
    loop {
        buffer.reserve(READ_BYTES);
        match stream.try_read_buf(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                stream.readable().await?;
                continue;
            }
            // It closed its end, and left something unread.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let mut input: Bytes = buffer.split().freeze();
        while let Some(frame) = reader.next(&mut input).map_err(Violation::from)? {
            frames.push(frame);
        }
        take(&mut frames)?;
        frames.clear();
    }
}

/// Waits until the peer has closed its end; passes over what comes.
pub(super) async fn closed(stream: &UnixStream) {
    let mut unread = [0; 4096];
    loop {
        match stream.try_read(&mut unread) {
            Ok(1..) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if stream.readable().await.is_err() {
                    return;
                }
            }
            // Any other error is that of a connection which is no more.
            Ok(0) | Err(_) => return,
        }
    }
}

/// Says who the holder is, and hands over a descriptor.
pub(super) async fn greet(
    stream: &UnixStream,
    token: &Token,
    descriptor: OwnedFd,
) -> io::Result<()> {
    let preamble = [&GREETING[..], token].concat();
    let fds = [descriptor.as_fd()];
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&fds));
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            Ok(sendmsg(
                stream,
                &[IoSlice::new(&preamble)],
                &mut control,
                flags,
            )?)
        })
        .await?;
    // An empty socket takes so few bytes at once.
    if sent == preamble.len() {
        Ok(())
    } else {
        Err(ErrorKind::WriteZero.into())
    }
}

/// Finds out who the holder is, and takes its descriptor.
pub(super) async fn greeted(stream: &UnixStream) -> Result<(Token, OwnedFd), Ended> {
    let mut preamble = [0; PREAMBLE_BYTES];
    let (received, descriptor) = stream
        .async_io(Interest::READABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let mut parts = [IoSliceMut::new(&mut preamble)];
            let message = recvmsg(stream, &mut parts, &mut control, flags)?;
            let mut messages = control.drain();
            let descriptor = messages.find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            Ok((message.bytes, descriptor))
        })
        .await?;
    let (greeting, token) = preamble.split_at(GREETING.len());
    let token = Token::try_from(token);
    match (descriptor, token) {
        (Some(descriptor), Ok(token)) if received == PREAMBLE_BYTES && greeting == GREETING => {
            Ok((token, descriptor))
        }
        _ => Err(Ended::Stranger),
    }
}

const READ_BYTES: usize = 64 << 10;
