//! Looking at what is there: a checkpoint against its manifest and its headers ([`check`]), against the one that it was
//! made from ([`against`]), and the machine ([`env`]).

pub mod against;
pub mod check;
pub mod env;
pub mod errors;
