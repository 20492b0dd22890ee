//! Later.
super::cases![];
