"""Object stores and web servers, reached with obstore; nothing here is imported before a path leads to one."""
