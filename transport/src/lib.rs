//! The data plane: how stored bytes travel.
//!
//! [`session`] is what both ends say to each other, without I/O; carriers move its frames.
//!
//! Not here: what requests ask for and what bytes mean (`kvasir-proto`), control calls
//! (`kvasir-client`, `kvasir-server`).

#![forbid(unsafe_code)]

pub mod session;
