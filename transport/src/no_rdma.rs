//! What carriers see of one-sided reads where they are left out: there is nobody to lend, and
//! nobody to read. See the feature `rdma`.

use std::convert::Infallible;
use std::error::Error;
use std::future::Ready;

use crate::fetching::Shared;
use crate::quic::Ended;
use crate::session::{Frame, RequestId, Violation};

type Broken = Box<dyn Error + Send + Sync>;

#[derive(Clone, Debug)]
pub(crate) enum Lender {}

#[derive(Debug)]
pub(crate) enum Lending {}

#[derive(Clone, Debug)]
pub(crate) enum Reader {}

#[derive(Debug)]
pub(crate) enum Prepared {}

#[derive(Clone, Debug)]
pub(crate) enum Reading {}

impl Lender {
    pub(crate) async fn connect(&self, _: Vec<u8>) -> Result<(Vec<u8>, Lending), Broken> {
        match *self {}
    }
}

impl Lending {
    pub(crate) fn lend(&self, _: Frame) -> Result<Ready<Frame>, Frame> {
        match *self {}
    }

    pub(crate) fn take_back(&self, _: impl Iterator<Item = Frame>) -> Result<(), Violation> {
        match *self {}
    }

    pub(crate) fn has_lent(&self, _: RequestId) -> bool {
        match *self {}
    }

    pub(crate) async fn broken(&self) -> Broken {
        match *self {}
    }
}

impl Reader {
    pub(crate) async fn prepare(&self) -> Option<Prepared> {
        match *self {}
    }
}

impl Prepared {
    pub(crate) fn endpoint(&self) -> Vec<u8> {
        match *self {}
    }

    pub(crate) async fn connect(self, _: Vec<u8>) -> Result<Reading, Broken> {
        match self {}
    }
}

impl Reading {
    pub(crate) fn begin(&self, _: Vec<Frame>) -> Result<(), Violation> {
        match *self {}
    }

    pub(crate) fn over(&self) -> Vec<u64> {
        match *self {}
    }

    pub(crate) async fn read(&self, _: &Shared) -> Result<Infallible, Ended> {
        match *self {}
    }
}
