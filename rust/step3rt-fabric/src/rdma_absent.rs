//! Stands in for `rdma` in a build without that feature: nothing can be used, and it says so.
//!
//! It has the names that the rest of the crate uses, and no link.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::config::LinkSettings;
use crate::contract::Link;
use crate::lane::LinkTerms;
use crate::rdma_status::{RdmaError, RdmaFinding};
use crate::state::LinkState;

pub(crate) const OFFER_BYTES: usize = 0;

#[derive(Default)]
pub(crate) struct Devices {}

pub(crate) fn usable() -> Result<(), RdmaError> {
    Err(RdmaError::NotBuilt)
}

pub(crate) fn report() -> Vec<RdmaFinding> {
    vec![RdmaFinding {
        is_good: false,
        found: "this build has no RDMA; peers on other hosts are reached over TCP".to_owned(),
        fix: "build with the cargo feature `rdma`".to_owned(),
    }]
}

/// There is none.
pub(crate) struct Prepared(Infallible);

impl Prepared {
    pub(crate) fn new(_: &Devices, _: LinkTerms, _: IpAddr) -> Result<Self, RdmaError> {
        Err(RdmaError::NotBuilt)
    }

    pub(crate) fn answer(
        _: &Devices,
        _: LinkTerms,
        _: IpAddr,
        _: &[u8],
    ) -> Result<Self, RdmaError> {
        Err(RdmaError::NotBuilt)
    }

    pub(crate) fn offer(&self) -> [u8; OFFER_BYTES] {
        match self.0 {}
    }

    pub(crate) fn connect(&mut self, _: &[u8]) -> Result<(), RdmaError> {
        match self.0 {}
    }

    pub(crate) fn into_link(
        self,
        _: OwnedFd,
        _: Arc<LinkState>,
        _: &LinkSettings,
    ) -> io::Result<Box<dyn Link>> {
        match self.0 {}
    }
}
