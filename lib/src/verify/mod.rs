//! Looking at what is there: a checkpoint against its manifest and its headers ([`check`]), against the one that it was
//! made from ([`against`]), what a text says about it ([`quality`]), and the machine ([`env`]).

pub mod against;
pub mod check;
pub mod env;
pub mod errors;
pub mod quality;
