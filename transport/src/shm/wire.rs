//! Frames over a Unix socket.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recv, recvmsg, send, sendmsg, shutdown,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::Notify;

use super::{Ended, GREETING, PREAMBLE_BYTES, Token};
use crate::session::{Frame, FrameReader, Violation};

/// One end of a connection.
///
/// The runtime watches it only while it is slept at: a watched socket wakes a thread for all
/// that comes, also where another one is about to take it.
#[derive(Debug)]
pub(super) struct Socket {
    stream: std::os::unix::net::UnixStream,
}

/// What an end has to say, and what it hears.
pub(super) trait End {
    /// Appends frames, if there are any, as long as there are fewer than [`SEND_BYTES`].
    fn gather(&self, out: &mut BytesMut);

    /// Whether there will be none any more.
    fn is_done(&self) -> bool {
        false
    }

    /// Takes frames.
    fn take(&self, frames: &mut Vec<Frame>) -> Result<(), Violation>;

    /// There may be frames to send.
    fn work(&self) -> &Notify;
}

impl Socket {
    pub(super) async fn connect(path: &Path) -> io::Result<Self> {
        Self::new(UnixStream::connect(path).await?)
    }

    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        let stream = stream.into_std()?;
        Ok(Self { stream })
    }

    /// Carries frames both ways, until the peer has closed its end, or `end` is done. It sleeps
    /// when for as long as `spin` nothing has moved.
    pub(super) async fn carry(&self, end: &impl End, spin: Duration) -> Result<(), Ended> {
        let mut reader = FrameReader::default();
        let (mut out, mut buffer) = (BytesMut::new(), BytesMut::new());
        let mut frames = Vec::new();
        let mut moved = Instant::now();
        loop {
            end.gather(&mut out);
            if out.is_empty() && end.is_done() {
                return Ok(());
            }
            let sent = self.send(&mut out)?;
            let received = match self.receive(&mut buffer)? {
                Received::Nothing => false,
                Received::Some => true,
                Received::End => return Ok(()),
            };
            if received {
                let mut input: Bytes = buffer.split().freeze();
                while let Some(frame) = reader.next(&mut input).map_err(Violation::from)? {
                    frames.push(frame);
                }
                end.take(&mut frames)?;
                frames.clear();
            }
            if sent || received {
                moved = Instant::now();
            } else if moved.elapsed() >= spin {
                let interest = match out.is_empty() {
                    true => Interest::READABLE,
                    false => Interest::READABLE | Interest::WRITABLE,
                };
                tokio::select! {
                    slept = self.sleep(interest) => slept?,
                    () = end.work().notified() => {}
                }
                moved = Instant::now();
                continue;
            }
            // A peer on another processor answers within microseconds; one that was woken on this
            // one cannot before it is given up.
            if moved.elapsed() >= HOLD {
                std::thread::yield_now();
            }
            tokio::task::yield_now().await;
        }
    }

    /// Sends of `out` what the socket takes; says whether it took anything.
    fn send(&self, out: &mut BytesMut) -> io::Result<bool> {
        let mut sent = false;
        while !out.is_empty() {
            match send(&self.stream, out, SEND) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => {
                    drop(out.split_to(count));
                    sent = true;
                }
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(sent)
    }

    /// Appends what has come.
    fn receive(&self, buffer: &mut BytesMut) -> io::Result<Received> {
        buffer.reserve(READ_BYTES);
        let space = buffer.spare_capacity_mut();
        match recv(&self.stream, space, RECEIVE) {
            Ok(((received, _), _)) => {
                let length = received.len();
                // SAFETY: so many bytes were written after those that there were.
                unsafe { buffer.set_len(buffer.len() + length) };
                Ok(match length {
                    0 => Received::End,
                    _ => Received::Some,
                })
            }
            Err(Errno::AGAIN) => Ok(Received::Nothing),
            // It closed its end, and left something unread.
            Err(Errno::CONNRESET) => Ok(Received::End),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the peer has closed its end; passes over what comes.
    pub(super) async fn closed(&self) {
        let mut unread = BytesMut::new();
        loop {
            match self.receive(&mut unread) {
                Ok(Received::Some) => unread.clear(),
                Ok(Received::Nothing) if self.sleep(Interest::READABLE).await.is_ok() => {}
                // Any error is that of a connection which is no more.
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// Sends nothing any more.
    pub(super) fn shut_down(&self) {
        // Of a connection that is no more, nothing can be sent anyway.
        let _ = shutdown(&self.stream, Shutdown::Write);
    }

    /// Waits until there is something to receive, or room to send.
    async fn sleep(&self, interest: Interest) -> io::Result<()> {
        // SAFETY: the descriptor stays open and the same for as long as it is borrowed.
        let watched = unsafe { AsyncFd::register_with_interest(self.stream.as_fd(), interest)? };
        let _ = watched.ready(interest).await?;
        Ok(())
    }

    /// Says who the holder is, and hands over a descriptor.
    pub(super) fn greet(&self, token: &Token, descriptor: OwnedFd) -> io::Result<()> {
        let preamble = [&GREETING[..], token].concat();
        let fds = [descriptor.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let parts = [IoSlice::new(&preamble)];
        let sent = sendmsg(&self.stream, &parts, &mut control, SEND)?;
        // An empty socket takes so few bytes, and at once.
        if sent == preamble.len() {
            Ok(())
        } else {
            Err(ErrorKind::WriteZero.into())
        }
    }

    /// Finds out who the holder is, and takes its descriptor.
    pub(super) async fn greeted(&self) -> Result<(Token, OwnedFd), Ended> {
        let mut preamble = [0; PREAMBLE_BYTES];
        let (received, descriptor) = loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RECEIVE;
            let mut parts = [IoSliceMut::new(&mut preamble)];
            match recvmsg(&self.stream, &mut parts, &mut control, flags) {
                Ok(message) => {
                    let descriptor = control.drain().find_map(|message| match message {
                        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                        _ => None,
                    });
                    break (message.bytes, descriptor);
                }
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
            self.sleep(Interest::READABLE).await?;
        };
        let (greeting, token) = preamble.split_at(GREETING.len());
        let token = Token::try_from(token);
        match (descriptor, token) {
            (Some(descriptor), Ok(token)) if received == PREAMBLE_BYTES && greeting == GREETING => {
                Ok((token, descriptor))
            }
            _ => Err(Ended::Stranger),
        }
    }
}

enum Received {
    Nothing,
    Some,
    /// The peer has closed its end.
    End,
}

/// Appends a frame.
pub(super) fn put(out: &mut BytesMut, frame: &Frame) {
    for part in frame.encode() {
        out.extend_from_slice(&part);
    }
}

/// How long a processor is held for what may come.
const HOLD: Duration = Duration::from_micros(10);
const SEND: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);
const RECEIVE: RecvFlags = RecvFlags::DONTWAIT;
/// Bytes of frames that are gathered before they are sent.
pub(super) const SEND_BYTES: usize = 64 << 10;
const READ_BYTES: usize = 64 << 10;
