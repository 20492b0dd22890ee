//! agent

pub mod engine;
